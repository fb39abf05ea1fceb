//! A kernel that hangs: nothing runs any more, and the hardware watchdog starts the board anew.

use crate::Case;
use crate::field::Field;
use crate::guest::{Guest, Setup};
use anyhow::{Context, Result, bail, ensure};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub const CASES: &[Case] = &[Case {
    name: "hang",
    proves: "a board whose processor turns in a circle, deaf to interrupts, is started anew by its watchdog, and is the node \
             that it was",
    run: hang,
}];

/// The watchdog bites 15 s after its last food, in the guest's time.
const BITE_LIMIT: Duration = Duration::from_secs(90);

fn hang(field: &mut Field) -> Result<()> {
    field.serve_dhcp(10, 3600)?;
    let index = field.add(Setup::new("name = \"pi1\"\nbootstrap = true\n"))?;
    let door = debug_door(&field.guests[index]);
    let server = format!("socket,id=debug,path={},server=on,wait=off", door.display());
    field.guests[index].set_machine_words(&["-chardev", &server, "-gdb", "chardev:debug"]);
    field.start(index)?;
    let guest = &mut field.guests[index];
    let watchdog = guest.wait_said(" watchdog ", Duration::from_secs(120))?;
    ensure!(watchdog.contains("bites after 15 s"), "{watchdog}");
    guest.wait_ready()?;
    guest.wait_member("pi1")?;
    guest.type_line("pi1", "node label pi1 kept=yes")?;
    let begin = Instant::now();
    let mut debugger = Debugger::open(&door)?;
    debugger.stop_the_processor()?;
    guest.wait_off(BITE_LIMIT)?;
    field.note("the processor turns in a circle → the watchdog has bitten", begin);
    // A panic would have ended the guest, too, and says so.
    let guest = &field.guests[index];
    let log = guest.log();
    let said = log.get(guest.log_start()..).unwrap_or_default();
    ensure!(!said.contains("Kernel panic") && !said.contains("Oops"), "it was no watchdog: {said}");
    ensure!(begin.elapsed() > Duration::from_secs(5), "it was the watchdog, which waits for food first");
    field.start(index)?;
    let guest = &mut field.guests[index];
    guest.wait_ready()?;
    let node = guest.wait_member("pi1")?;
    ensure!(node.contains("kept=yes"), "{node}");
    Ok(())
}

fn debug_door(guest: &Guest) -> PathBuf {
    guest.dir().join("debug.sock")
}

/// QEMU's debugger, by the serial protocol of GDB. Whoever connects stops the guest.
struct Debugger {
    stream: UnixStream,
}

impl Debugger {
    fn open(door: &std::path::Path) -> Result<Debugger> {
        let stream = UnixStream::connect(door).context("connect to QEMU's debugger")?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Debugger { stream })
    }

    /// Wherever it is: no interrupts, and a jump to itself.
    fn stop_the_processor(&mut self) -> Result<()> {
        // Behind sixteen registers of eight bytes each.
        const INSTRUCTION_POINTER: std::ops::Range<usize> = 128..136;
        const SECOND_BYTE_OF_FLAGS: usize = 137;
        const INTERRUPTS: u8 = 0b10;
        let mut registers = bytes_of(&self.ask("g")?)?;
        let at = registers.get(INSTRUCTION_POINTER).and_then(|bytes| bytes.try_into().ok());
        let at = u64::from_le_bytes(at.context("registers of an x86_64")?);
        *registers.get_mut(SECOND_BYTE_OF_FLAGS).context("flags")? &= !INTERRUPTS;
        let registers: String = registers.iter().map(|byte| format!("{byte:02x}")).collect();
        for order in [format!("M{at:x},2:ebfe"), format!("G{registers}")] {
            let answer = self.ask(&order)?;
            ensure!(answer == "OK", "{order}: {answer}");
        }
        self.say("c")
    }

    fn say(&mut self, text: &str) -> Result<()> {
        let sum = text.bytes().fold(0u8, u8::wrapping_add);
        Ok(write!(self.stream, "${text}#{sum:02x}")?)
    }

    fn ask(&mut self, text: &str) -> Result<String> {
        self.say(text)?;
        loop {
            let answer = self.hear().with_context(|| format!("no answer to {text}"))?;
            match answer.bytes().next() {
                // That the guest has stopped.
                Some(b'T' | b'S') => {}
                None | Some(b'E') => bail!("QEMU's debugger refuses {text:.40}: {answer:?}"),
                Some(_) => return Ok(answer),
            }
        }
    }

    /// A packet's text. What stands before it acknowledges ours.
    fn hear(&mut self) -> Result<String> {
        let mut next = || -> Result<u8> {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            Ok(byte[0])
        };
        while next()? != b'$' {}
        let mut heard = Vec::new();
        loop {
            match next()? {
                b'#' => break,
                byte => heard.push(byte),
            }
        }
        // Its checksum: the socket is one of this machine.
        let _ = (next()?, next()?);
        self.stream.write_all(b"+")?;
        Ok(String::from_utf8(heard)?)
    }
}

fn bytes_of(text: &str) -> Result<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2).map(|pair| {
        let pair = std::str::from_utf8(pair)?;
        Ok(u8::from_str_radix(pair, 16)?)
    });
    pairs.collect::<Result<_>>().with_context(|| format!("not bytes: {text}"))
}
