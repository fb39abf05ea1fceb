//! What `tinydc` says about itself: the overview, and what is missing when a line could not be read.

use super::failure::Failure;

pub const OVERVIEW: &str = "\
tinydc turns a handful of small boards into one small datacenter.

  $ tinydc deploy      in a directory with a compose.yaml; it ends with the addresses to open

Apps
  deploy       run what a Compose file describes, or change what runs (also: up -d)
  ls           apps, and where to open them
  ps           instances: state, node, last exit
  status       what is wanted, what runs, and why not
  logs         what an app, a service or an instance printed
  exec         run a command in an instance
  scale        change how many instances a service has
  rm           remove an app; its volumes are kept unless told otherwise (also: down)

Cluster
  init         found a cluster on this node, or on a board that shows a code
  token        a line that lets nodes join, or a person use the cluster from a laptop
  join, leave  become a member of a cluster, or show how; stop being one
  node         run the daemon; take machines in; list, drain, label and remove nodes
  user         who may use the cluster from a laptop
  settings     what holds for the whole cluster
  net          addresses, endpoints, ways between nodes, and what is in the way
  address      addresses of the cluster on the LAN, which outlive a node
  image        load, list and remove images
  secret       passwords, keys and certificates that containers find as files
  ca           the certificate to trust for HTTPS by the cluster's own authority
  events       what happened

Here
  demo         a cluster on this machine alone, whose busiest node is killed
  context      clusters that this machine may talk to
  version      of this program and of the daemon
  help VERB    a verb's options and an example

Names are APP, APP/SERVICE or APP/SERVICE.N; in an app's Compose directory SERVICE is enough.
Everywhere: --context NAME, --host unix:///PATH, --data-dir PATH, --json
Exit codes: 0 done, 1 refused, 2 usage, 3 unreachable or no leader, 4 outcome unknown
";

const EVERYWHERE: &str = "\nEverywhere: --context NAME, --host unix:///PATH, --data-dir PATH, --json\n";

/// The words for argh; `None`: the overview is wanted. `help VERB` is `VERB --help`, `up` is `deploy`.
pub fn wanted_words(mut words: Vec<String>) -> Option<Vec<String>> {
    match words.first().map(String::as_str) {
        None | Some("--help" | "-h") => return None,
        Some("help") => {
            words.remove(0);
            if words.is_empty() {
                return None;
            }
            words.push("--help".into());
        }
        Some("--version" | "-V") => words = vec!["version".into()],
        _ => {}
    }
    if words[0] == "up" {
        words[0] = "deploy".into();
    }
    Some(words)
}

/// A verb's help, with what every verb takes.
pub fn complete(help: &str) -> String {
    format!("{}\n{EVERYWHERE}", help.trim_end())
}

/// argh's complaint, made one line.
pub fn explain_usage(verb: &str, complaint: &str) -> Failure {
    let line: Vec<&str> = complaint.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let message = line.join(" ").replace("Required positional arguments not provided:", "missing:");
    let message = message.replace("Required options not provided:", "missing:");
    if message.starts_with("One of the following subcommands must be present") {
        let message = match verb {
            "" => "nothing to do".into(),
            verb => format!("{verb} needs to be told what"),
        };
        return Failure::usage(message).hint(format!("tinydc {verb} --help"));
    }
    let is_verb_unknown = message == format!("Unrecognized argument: {verb}");
    if is_verb_unknown {
        return Failure::usage(format!("there is no verb {verb:?}")).hint("tinydc help lists the verbs");
    }
    let message = lower_first(&message);
    Failure::usage(message).hint(format!("tinydc {verb} --help"))
}

fn lower_first(text: &str) -> String {
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overview_fits_a_screen() {
        assert!(OVERVIEW.lines().count() <= 40);
        for line in OVERVIEW.lines() {
            assert!(line.chars().count() <= 100, "{line}");
        }
    }

    #[test]
    fn help_is_found_in_every_way_it_is_asked_for() {
        let words = |typed: &str| {
            wanted_words(typed.split_whitespace().map(String::from).collect()).map(|words| words.join(" "))
        };
        for typed in ["", "help", "--help", "-h"] {
            assert_eq!(words(typed), None, "{typed}");
        }
        assert_eq!(words("help up").as_deref(), Some("deploy --help"));
        assert_eq!(words("help node ls").as_deref(), Some("node ls --help"));
        assert_eq!(words("up -d").as_deref(), Some("deploy -d"));
    }
}
