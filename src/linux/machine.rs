//! What only the first process of a machine does: modules, partitions, file systems that grow, the clock, the
//! watchdog, the end.
//!
//! Input: open files and plain values. Output: nothing, or the error of the call that failed.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Loads a kernel module from an uncompressed file. One that is loaded already is fine.
pub fn load_module(file: &File, options: &CStr) -> io::Result<()> {
    // SAFETY: the descriptor is open and the string ends in zero; both outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), options.as_ptr(), 0) };
    match checked(result) {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Tells the kernel the new size of a partition, also while it is mounted. `disk` is the whole disk.
pub fn resize_partition(disk: &File, number: u32, start_bytes: u64, length_bytes: u64) -> io::Result<()> {
    const BLKPG: libc::c_ulong = 0x1269;
    const RESIZE: libc::c_int = 3;
    /// struct blkpg_partition of linux/blkpg.h.
    #[repr(C)]
    struct Partition {
        start: i64,
        length: i64,
        number: libc::c_int,
        device_name: [u8; 64],
        volume_name: [u8; 64],
    }
    /// struct blkpg_ioctl_arg.
    #[repr(C)]
    struct Request {
        operation: libc::c_int,
        flags: libc::c_int,
        length: libc::c_int,
        data: *mut Partition,
    }
    let mut partition = Partition {
        start: start_bytes as i64,
        length: length_bytes as i64,
        number: number as libc::c_int,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let mut request = Request {
        operation: RESIZE,
        flags: 0,
        length: size_of::<Partition>() as libc::c_int,
        data: &mut partition,
    };
    // SAFETY: BLKPG reads one request and the partition that it points to; both are live for the call.
    checked(unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG as _, &mut request) }.into()).map(drop)
}

/// Grows a mounted ext4 to this many blocks. `folder` is any open file on it.
pub fn grow_ext4(folder: &File, blocks: u64) -> io::Result<()> {
    // _IOW('f', 16, __u64)
    const RESIZE_FS: libc::c_ulong = 0x4008_6610;
    // SAFETY: the call reads one u64, which lives until it returns.
    checked(unsafe { libc::ioctl(folder.as_raw_fd(), RESIZE_FS as _, &blocks) }.into()).map(drop)
}

/// The size of a block device.
pub fn device_bytes(device: &File) -> io::Result<u64> {
    // _IOR(0x12, 114, size_t)
    const GET_SIZE: libc::c_ulong = 0x8008_1272;
    let mut bytes = 0u64;
    // SAFETY: the call writes one u64 to the pointer, which is valid.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), GET_SIZE as _, &mut bytes) }.into())?;
    Ok(bytes)
}

/// Sets the wall clock at once.
pub fn set_clock(since_1970: Duration) -> io::Result<()> {
    let time = libc::timespec { tv_sec: since_1970.as_secs() as _, tv_nsec: since_1970.subsec_nanos() as _ };
    // SAFETY: the kernel reads one timespec, which outlives the call.
    checked(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &time) }.into()).map(drop)
}

/// Moves the clock by at most 500 ppm until `offset` is made up; up to half a second either way.
pub fn slew_clock(offset_us: i64) -> io::Result<()> {
    // SAFETY: all-zero is a valid timex; the kernel reads and writes within it, and it outlives the call.
    let result = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        timex.modes = libc::ADJ_OFFSET_SINGLESHOT;
        timex.offset = offset_us as _;
        libc::adjtimex(&mut timex)
    };
    checked(result.into()).map(drop)
}

/// Tells the kernel, and through it every program, that the clock is right to within `error`. The kernel takes this
/// back by itself after some hours without a new call.
pub fn mark_synchronised(error: Duration) -> io::Result<()> {
    // SAFETY: as above.
    let result = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        timex.modes = libc::ADJ_STATUS | libc::ADJ_MAXERROR | libc::ADJ_ESTERROR;
        timex.status = 0;
        timex.maxerror = error.as_micros() as _;
        timex.esterror = timex.maxerror;
        libc::adjtimex(&mut timex)
    };
    checked(result.into()).map(drop)
}

/// Asks the watchdog to bite after this long without `feed`; what the hardware grants.
pub fn set_watchdog_timeout(watchdog: &File, seconds: u32) -> io::Result<u32> {
    // _IOWR('W', 6, int)
    const SET_TIMEOUT: libc::c_ulong = 0xc004_5706;
    let mut seconds = seconds as libc::c_int;
    // SAFETY: the call reads and writes one int, which is valid for the call.
    checked(unsafe { libc::ioctl(watchdog.as_raw_fd(), SET_TIMEOUT as _, &mut seconds) }.into())?;
    Ok(seconds.max(1) as u32)
}

/// How a machine ends its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    PowerOff,
    Restart,
    /// The next start tries the other boot slot, once: a Raspberry Pi's firmware understands this word.
    RestartOther,
}

/// Ends the machine's run. Returns only with an error.
pub fn end(ending: Ending) -> io::Error {
    const OTHER: &CStr = c"0 tryboot";
    let command = match ending {
        Ending::PowerOff => libc::LINUX_REBOOT_CMD_POWER_OFF,
        Ending::Restart => libc::LINUX_REBOOT_CMD_RESTART,
        Ending::RestartOther => libc::LINUX_REBOOT_CMD_RESTART2,
    };
    // SAFETY: the constants are the kernel's; the word is read only for RESTART2 and ends in zero.
    unsafe {
        libc::syscall(
            libc::SYS_reboot,
            libc::LINUX_REBOOT_MAGIC1,
            libc::LINUX_REBOOT_MAGIC2,
            command,
            OTHER.as_ptr(),
        );
    }
    io::Error::last_os_error()
}

/// Ctrl-Alt-Del becomes a SIGINT to the first process, instead of an end at once.
pub fn take_ctrl_alt_del() -> io::Result<()> {
    // SAFETY: no memory is handed over.
    checked(unsafe { libc::reboot(libc::RB_DISABLE_CAD) }.into()).map(drop)
}

/// Every event of the kernel's devices, one message each: `add@/devices/…\0KEY=value\0…`.
pub fn device_events() -> io::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType};
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let protocol = SockProtocol::NetlinkKObjectUEvent;
    let socket = nix::sys::socket::socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    nix::sys::socket::bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
    Ok(socket)
}

/// A word whenever a link or an address of this network namespace changes.
pub fn network_events() -> io::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType};
    const GROUP_LINK: u32 = 1;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let protocol = SockProtocol::NetlinkRoute;
    let socket = nix::sys::socket::socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    nix::sys::socket::bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUP_LINK))?;
    Ok(socket)
}

/// Makes a process the leader of a session whose terminal is its standard input: what the one at the keyboard types
/// reaches it, Ctrl-C included. For the child between fork and exec.
pub fn take_terminal(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: the closure runs in the forked child and makes two system calls, which are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY as _, 1) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Reads what waits, without waiting. `None`: nothing.
pub fn read_waiting(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match rustix::io::read(fd, buffer) {
        Ok(length) => Ok(Some(length)),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}
