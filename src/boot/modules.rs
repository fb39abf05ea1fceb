//! Which kernel modules to load, in which order, for a name or for a device.
//!
//! Input: the texts that depmod writes. Output: files in the order in which they must be loaded. Pure.
//!
//! A *hard* need is in `modules.dep`; a *soft* one (`softdep X pre: Y`) is only in the module itself, and loading X
//! without it works until the first use: ext4 without its checksum mounts nothing.
//!
//! Invariant: a module never stands before one that it needs (`what_is_needed_comes_first`).

use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Module {
    /// Below the modules' folder.
    file: String,
    needs: Vec<String>,
    before: Vec<String>,
    after: Vec<String>,
}

/// Every module of one kernel.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    modules: BTreeMap<String, Module>,
    /// Pattern and module, in depmod's order.
    aliases: Vec<(String, String)>,
}

/// `kernel/fs/ext4/ext4.ko.xz` → `ext4`; the kernel's own names have `_` where files may have `-`.
pub fn name_of(file: &str) -> String {
    let last = file.rsplit('/').next().unwrap_or(file);
    last.split(".ko").next().unwrap_or(last).replace('-', "_")
}

impl Catalogue {
    /// From the texts of `modules.dep`, `modules.softdep` and `modules.alias`.
    pub fn parse(dependencies: &str, soft: &str, aliases: &str) -> Catalogue {
        let mut catalogue = Catalogue::default();
        for (file, needs) in dependencies.lines().filter_map(|line| line.split_once(':')) {
            let module = Module {
                file: file.into(),
                needs: needs.split_whitespace().map(name_of).collect(),
                ..Module::default()
            };
            catalogue.modules.insert(name_of(file), module);
        }
        for line in soft.lines() {
            catalogue.take_soft(line);
        }
        for line in aliases.lines() {
            let mut words = line.split_whitespace();
            if let (Some("alias"), Some(pattern), Some(module)) = (words.next(), words.next(), words.next()) {
                catalogue.aliases.push((pattern.into(), module.replace('-', "_")));
            }
        }
        catalogue
    }

    /// `softdep NAME pre: A B post: C`
    fn take_soft(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        if words.next() != Some("softdep") {
            return;
        }
        let name = words.next().map(name_of).unwrap_or_default();
        let Some(module) = self.modules.get_mut(&name) else { return };
        let mut is_before = true;
        for word in words {
            match word {
                "pre:" => is_before = true,
                "post:" => is_before = false,
                other if is_before => module.before.push(name_of(other)),
                other => module.after.push(name_of(other)),
            }
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.modules.contains_key(&name.replace('-', "_"))
    }

    /// The file of a module, below the modules' folder.
    pub fn file(&self, name: &str) -> Option<&str> {
        self.modules.get(name).map(|module| module.file.as_str())
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.modules.keys().map(String::as_str)
    }

    /// Modules for a device's `modalias`, or for another alias of a module.
    pub fn for_alias<'a>(&'a self, alias: &str) -> Vec<&'a str> {
        let fitting = self.aliases.iter().filter(|(pattern, _)| fits(pattern.as_bytes(), alias.as_bytes()));
        fitting.map(|(_, module)| module.as_str()).filter(|module| self.has(module)).collect()
    }

    /// `names` and all that they need, in the order of loading, each once. Soft needs that this kernel does not have as
    /// modules are left out: they are built in.
    pub fn order(&self, names: &[&str]) -> Vec<String> {
        let mut order = Order { catalogue: self, placed: Vec::new(), seen: BTreeSet::new() };
        for name in names {
            order.place(&name.replace('-', "_"));
        }
        order.placed
    }

    /// The three texts for the modules `kept` alone; `rename` gives each file's new name.
    pub fn texts_of(
        &self,
        kept: &BTreeSet<String>,
        rename: impl Fn(&str) -> String,
    ) -> (String, String, String) {
        let (mut dependencies, mut soft, mut aliases) = (String::new(), String::new(), String::new());
        for (name, module) in self.modules.iter().filter(|(name, _)| kept.contains(*name)) {
            let needs = module.needs.iter().filter_map(|need| self.modules.get(need));
            let needs: String = needs.map(|need| format!(" {}", rename(&need.file))).collect();
            dependencies += &format!("{}:{needs}\n", rename(&module.file));
            let words =
                |names: &[String]| -> String { names.iter().map(|name| format!(" {name}")).collect() };
            if !module.before.is_empty() || !module.after.is_empty() {
                soft +=
                    &format!("softdep {name} pre:{} post:{}\n", words(&module.before), words(&module.after));
            }
        }
        for (pattern, module) in self.aliases.iter().filter(|(_, module)| kept.contains(module)) {
            aliases += &format!("alias {pattern} {module}\n");
        }
        (dependencies, soft, aliases)
    }
}

struct Order<'a> {
    catalogue: &'a Catalogue,
    placed: Vec<String>,
    seen: BTreeSet<String>,
}

impl Order<'_> {
    fn place(&mut self, name: &str) {
        let Some(module) = self.catalogue.modules.get(name) else { return };
        // Two modules may name each other as soft needs; the one that was asked for first waits for the other.
        if !self.seen.insert(name.into()) {
            return;
        }
        // depmod lists the nearest need first, the farthest last.
        for need in module.before.iter().chain(module.needs.iter().rev()) {
            self.place(need);
        }
        self.placed.push(name.into());
        for later in &module.after {
            self.place(later);
        }
    }
}

/// Shell patterns as depmod uses them: `*`, `?` and `[a-z]`.
fn fits(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut from) = (0, 0);
    let mut star = None;
    while from < text.len() {
        match one_fits(&pattern[at..], text[from]) {
            Some(length) => (at, from) = (at + length, from + 1),
            None if pattern.get(at) == Some(&b'*') => {
                star = Some((at + 1, from));
                at += 1;
            }
            None => match star {
                // The last star takes one more.
                Some((after, taken)) => {
                    star = Some((after, taken + 1));
                    (at, from) = (after, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

/// How many bytes of the pattern stand for this byte; `None` when they don't, or a star is next.
fn one_fits(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern.first()? {
        b'*' => None,
        b'?' => Some(1),
        b'[' => {
            let end = pattern.iter().position(|byte| *byte == b']')?;
            let inside = &pattern[1..end];
            let in_range = inside.windows(3).any(|w| w[1] == b'-' && (w[0]..=w[2]).contains(&byte));
            (in_range || inside.contains(&byte)).then_some(end + 1)
        }
        literal => (*literal == byte).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "\
kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/fs/mbcache.ko.xz
kernel/fs/jbd2/jbd2.ko.xz:
kernel/fs/mbcache.ko.xz:
kernel/crypto/crc32c-generic.ko.xz:
kernel/drivers/net/a.ko.xz: kernel/drivers/net/b.ko.xz kernel/drivers/net/c.ko.xz
kernel/drivers/net/b.ko.xz: kernel/drivers/net/c.ko.xz
kernel/drivers/net/c.ko.xz:
kernel/drivers/net/lan78xx.ko.xz:
kernel/drivers/net/phy.ko.xz:
";
    const SOFT: &str = "# a remark\nsoftdep ext4 pre: crc32c-generic\nsoftdep lan78xx post: phy\nsoftdep phy pre: lan78xx built_in\n";
    const ALIASES: &str = "\
alias usb:v0424d7800dc*dsc*dp*ic*isc*ip*in* lan78xx
alias fs-ext4 ext4
alias of:N*T*Cbrcm,bcm2711[a-c]x* b
alias of:N*T*Cgone gone
";

    fn catalogue() -> Catalogue {
        Catalogue::parse(DEPENDENCIES, SOFT, ALIASES)
    }

    #[test]
    fn what_is_needed_comes_first() {
        let order = |names: &[&str]| catalogue().order(names).join(" ");
        assert_eq!(order(&["ext4"]), "crc32c_generic mbcache jbd2 ext4");
        assert_eq!(order(&["a"]), "c b a");
        assert_eq!(order(&["a", "b", "no-such"]), "c b a");
        assert_eq!(order(&["lan78xx"]), "lan78xx phy");
        assert_eq!(order(&["phy"]), "lan78xx phy", "each soft need of the other");
    }

    #[test]
    fn a_device_finds_its_module() {
        let catalogue = catalogue();
        assert_eq!(catalogue.for_alias("usb:v0424d7800dc00dscffdpFFicFFisc00ipFFin00"), ["lan78xx"]);
        assert_eq!(catalogue.for_alias("of:NethernetT(null)Cbrcm,bcm2711bxCother"), ["b"]);
        assert!(catalogue.for_alias("of:NethernetT(null)Cbrcm,bcm2711dx").is_empty());
        assert!(catalogue.for_alias("of:NxTyCgone").is_empty(), "a module that is not here");
        assert_eq!(catalogue.for_alias("fs-ext4"), ["ext4"]);
    }

    #[test]
    fn the_texts_of_a_part_read_back() {
        let catalogue = catalogue();
        let kept: BTreeSet<String> = catalogue.order(&["ext4", "lan78xx"]).into_iter().collect();
        let (dependencies, soft, aliases) =
            catalogue.texts_of(&kept, |file| file.trim_end_matches(".xz").into());
        let part = Catalogue::parse(&dependencies, &soft, &aliases);
        assert_eq!(part.order(&["ext4"]), catalogue.order(&["ext4"]));
        assert_eq!(part.file("ext4"), Some("kernel/fs/ext4/ext4.ko"));
        assert_eq!(part.for_alias("fs-ext4"), ["ext4"]);
        assert!(!part.has("a"));
    }
}
