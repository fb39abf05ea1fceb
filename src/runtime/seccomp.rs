//! Docker's default system call filter, for containers and for commands run inside them.
//!
//! Input: the capabilities that a container keeps. Output: BPF programs for this architecture.
//! Two programs are stacked because one program has one refusal: the first answers ENOSYS to `clone3`, whose flags a
//! filter cannot see, so that libc falls back to `clone`; the second allows the list below and answers EPERM
//! otherwise. The kernel runs both and takes the stricter answer.
//!
//! Invariant: a refused call returns an error and does not kill (`tests/runtime`, exec under seccomp).

use std::collections::BTreeMap;

use oci_spec::runtime::Capability;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use libc::*;

#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("no system call filter for architecture {0}")]
    Architecture(String),
    #[error("compile the system call filter")]
    Compile(#[from] seccompiler::BackendError),
}

/// The namespace flags of `clone`: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
const CLONE_NEW_MASK: u64 = 0x7e02_0000;
const AF_VSOCK_FAMILY: u64 = 40;
/// Execution domains that need no privilege: Linux, 32-bit, with and without the short task names, and "query".
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Allowed to everyone on every architecture.
#[rustfmt::skip]
const ALLOWED: &[c_long] = &[
    SYS_accept, SYS_accept4, SYS_adjtimex, SYS_bind, SYS_brk, SYS_capget, SYS_capset, SYS_chdir, SYS_clock_adjtime,
    SYS_clock_getres, SYS_clock_gettime, SYS_clock_nanosleep, SYS_close, SYS_close_range, SYS_connect,
    SYS_copy_file_range, SYS_dup, SYS_dup3, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2,
    SYS_eventfd2, SYS_execve, SYS_execveat, SYS_exit, SYS_exit_group, SYS_faccessat, SYS_faccessat2, SYS_fadvise64,
    SYS_fallocate, SYS_fanotify_mark, SYS_fchdir, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_fcntl,
    SYS_fdatasync, SYS_fgetxattr, SYS_flistxattr, SYS_flock, SYS_fremovexattr, SYS_fsetxattr, SYS_fstat, SYS_fstatfs,
    SYS_fsync, SYS_ftruncate, SYS_futex, SYS_futex_waitv, SYS_getcpu, SYS_getcwd, SYS_getdents64, SYS_getegid,
    SYS_geteuid, SYS_getgid, SYS_getgroups, SYS_getitimer, SYS_getpeername, SYS_getpgid, SYS_getpid, SYS_getppid,
    SYS_getpriority, SYS_getrandom, SYS_getresgid, SYS_getresuid, SYS_get_robust_list, SYS_getrusage, SYS_getsid,
    SYS_getsockname, SYS_getsockopt, SYS_gettid, SYS_gettimeofday, SYS_getuid, SYS_getxattr, SYS_inotify_add_watch,
    SYS_inotify_init1, SYS_inotify_rm_watch, SYS_io_cancel, SYS_ioctl, SYS_io_destroy, SYS_io_getevents,
    SYS_ioprio_get, SYS_ioprio_set, SYS_io_setup, SYS_io_submit, SYS_kill,
    SYS_landlock_add_rule, SYS_landlock_create_ruleset, SYS_landlock_restrict_self, SYS_lgetxattr, SYS_linkat,
    SYS_listen, SYS_listxattr, SYS_llistxattr, SYS_lremovexattr, SYS_lseek, SYS_lsetxattr, SYS_madvise,
    SYS_membarrier, SYS_memfd_create, SYS_mincore, SYS_mkdirat, SYS_mknodat, SYS_mlock, SYS_mlock2, SYS_mlockall,
    SYS_mmap, SYS_mprotect, SYS_mq_getsetattr, SYS_mq_notify, SYS_mq_open, SYS_mq_timedreceive, SYS_mq_timedsend,
    SYS_mq_unlink, SYS_mremap, SYS_msgctl, SYS_msgget, SYS_msgrcv, SYS_msgsnd, SYS_msync, SYS_munlock,
    SYS_munlockall, SYS_munmap, SYS_name_to_handle_at, SYS_nanosleep, SYS_newfstatat, SYS_openat, SYS_openat2,
    SYS_pidfd_open, SYS_pidfd_send_signal, SYS_pipe2, SYS_pkey_alloc, SYS_pkey_free, SYS_pkey_mprotect, SYS_ppoll,
    SYS_prctl, SYS_pread64, SYS_preadv, SYS_preadv2, SYS_prlimit64, SYS_process_mrelease, SYS_process_vm_readv,
    SYS_process_vm_writev, SYS_pselect6, SYS_ptrace, SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read,
    SYS_readahead, SYS_readlinkat, SYS_readv, SYS_recvfrom, SYS_recvmmsg, SYS_recvmsg, SYS_remap_file_pages,
    SYS_removexattr, SYS_renameat2, SYS_restart_syscall, SYS_rseq, SYS_rt_sigaction,
    SYS_rt_sigpending, SYS_rt_sigprocmask, SYS_rt_sigqueueinfo, SYS_rt_sigreturn, SYS_rt_sigsuspend,
    SYS_rt_sigtimedwait, SYS_rt_tgsigqueueinfo, SYS_sched_getaffinity, SYS_sched_getattr, SYS_sched_getparam,
    SYS_sched_get_priority_max, SYS_sched_get_priority_min, SYS_sched_getscheduler, SYS_sched_rr_get_interval,
    SYS_sched_setaffinity, SYS_sched_setattr, SYS_sched_setparam, SYS_sched_setscheduler, SYS_sched_yield,
    SYS_seccomp, SYS_semctl, SYS_semget, SYS_semop, SYS_semtimedop, SYS_sendfile, SYS_sendmmsg, SYS_sendmsg,
    SYS_sendto, SYS_setfsgid, SYS_setfsuid, SYS_setgid, SYS_setgroups, SYS_setitimer, SYS_setpgid, SYS_setpriority,
    SYS_setregid, SYS_setresgid, SYS_setresuid, SYS_setreuid, SYS_set_robust_list, SYS_setsid, SYS_setsockopt,
    SYS_set_tid_address, SYS_setuid, SYS_setxattr, SYS_shmat, SYS_shmctl, SYS_shmdt, SYS_shmget, SYS_shutdown,
    SYS_sigaltstack, SYS_signalfd4, SYS_socketpair, SYS_splice, SYS_statfs, SYS_statx, SYS_symlinkat, SYS_sync,
    SYS_syncfs, SYS_sysinfo, SYS_tee, SYS_tgkill, SYS_timer_create, SYS_timer_delete,
    SYS_timerfd_create, SYS_timerfd_gettime, SYS_timerfd_settime, SYS_timer_getoverrun, SYS_timer_gettime,
    SYS_timer_settime, SYS_times, SYS_tkill, SYS_truncate, SYS_umask, SYS_uname, SYS_unlinkat, SYS_utimensat,
    SYS_vmsplice, SYS_wait4, SYS_waitid, SYS_write, SYS_writev,
    SYS_memfd_secret,
];

/// Younger than some C library's list of names; their numbers are the same on every architecture:
/// cachestat, fchmodat2, map_shadow_stack, futex_wake, futex_wait, futex_requeue, lsm_get_self_attr, mseal,
/// getxattrat, listxattrat, removexattrat, setxattrat.
const ALLOWED_BY_NUMBER: &[c_long] = &[451, 452, 453, 454, 455, 456, 459, 462, 463, 464, 465, 466];

/// Names that some C library's list for an architecture lacks: io_pgetevents, renameat, setrlimit, getrlimit,
/// sync_file_range.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE_BY_NUMBER: &[c_long] = &[333, 264, 160, 97, 277];
#[cfg(target_arch = "aarch64")]
const ALLOWED_HERE_BY_NUMBER: &[c_long] = &[292, 38, 164, 163, 84];

#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const ALLOWED_HERE: &[c_long] = &[
    SYS_access, SYS_alarm, SYS_arch_prctl, SYS_chmod, SYS_chown, SYS_creat, SYS_dup2, SYS_epoll_create,
    SYS_epoll_ctl_old, SYS_epoll_wait, SYS_epoll_wait_old, SYS_eventfd, SYS_fork, SYS_futimesat, SYS_getdents,
    SYS_getpgrp, SYS_get_thread_area, SYS_inotify_init, SYS_lchown, SYS_link, SYS_lstat, SYS_mkdir, SYS_mknod,
    SYS_modify_ldt, SYS_open, SYS_pause, SYS_pipe, SYS_poll, SYS_readlink, SYS_rename, SYS_rmdir, SYS_select,
    SYS_set_thread_area, SYS_signalfd, SYS_stat, SYS_symlink, SYS_time, SYS_unlink, SYS_utime, SYS_utimes, SYS_vfork,
];

#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[c_long] = &[];

/// What a capability opens.
#[rustfmt::skip]
const ALLOWED_WITH: &[(Capability, &[c_long])] = &[
    (Capability::DacReadSearch, &[SYS_open_by_handle_at]),
    (Capability::SysAdmin, &[
        SYS_bpf, SYS_clone, SYS_clone3, SYS_fanotify_init, SYS_fsconfig, SYS_fsmount, SYS_fsopen, SYS_fspick,
        SYS_lookup_dcookie, SYS_mount, SYS_mount_setattr, SYS_move_mount, SYS_open_tree, SYS_perf_event_open,
        SYS_quotactl, SYS_setdomainname, SYS_sethostname, SYS_setns, SYS_syslog, SYS_umount2, SYS_unshare,
    ]),
    (Capability::SysBoot, &[SYS_reboot]),
    (Capability::SysChroot, &[SYS_chroot]),
    (Capability::SysModule, &[SYS_delete_module, SYS_init_module, SYS_finit_module]),
    (Capability::SysPacct, &[SYS_acct]),
    (Capability::SysPtrace, &[SYS_kcmp, SYS_pidfd_getfd, SYS_process_madvise]),
    #[cfg(target_arch = "x86_64")]
    (Capability::SysRawio, &[SYS_iopl, SYS_ioperm]),
    (Capability::SysTime, &[SYS_settimeofday, SYS_clock_settime]),
    (Capability::SysTtyConfig, &[SYS_vhangup]),
    (Capability::SysNice, &[SYS_get_mempolicy, SYS_mbind, SYS_set_mempolicy]),
    (Capability::Syslog, &[SYS_syslog]),
    (Capability::Bpf, &[SYS_bpf]),
    (Capability::Perfmon, &[SYS_perf_event_open]),
];

/// The programs for a container with these capabilities, to be applied in order.
pub fn default_profile(has_capability: &dyn Fn(Capability) -> bool) -> Result<Vec<BpfProgram>, SeccompError> {
    let name = std::env::consts::ARCH;
    let arch: TargetArch = name.try_into().map_err(|_| SeccompError::Architecture(name.to_owned()))?;
    let mut programs = Vec::new();
    let is_admin = has_capability(Capability::SysAdmin);
    if !is_admin {
        let absent = BTreeMap::from([(SYS_clone3, Vec::new())]);
        let answer = SeccompAction::Errno(ENOSYS as u32);
        programs.push(SeccompFilter::new(absent, SeccompAction::Allow, answer, arch)?.try_into()?);
    }
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = BTreeMap::new();
    let everyone = [ALLOWED, ALLOWED_BY_NUMBER, ALLOWED_HERE, ALLOWED_HERE_BY_NUMBER].concat();
    rules.extend(everyone.into_iter().map(|number| (number, Vec::new())));
    rules.insert(SYS_socket, vec![rule(SeccompCmpOp::Ne, AF_VSOCK_FAMILY, SeccompCmpArgLen::Dword)?]);
    let personalities =
        PERSONALITIES.iter().map(|value| rule(SeccompCmpOp::Eq, *value, SeccompCmpArgLen::Dword));
    rules.insert(SYS_personality, personalities.collect::<Result<_, _>>()?);
    if !is_admin {
        let plain = rule(SeccompCmpOp::MaskedEq(CLONE_NEW_MASK), 0, SeccompCmpArgLen::Qword)?;
        rules.insert(SYS_clone, vec![plain]);
        // The first program has answered ENOSYS already; here it must only not become EPERM.
        rules.insert(SYS_clone3, Vec::new());
    }
    for (capability, numbers) in ALLOWED_WITH {
        if has_capability(*capability) {
            rules.extend(numbers.iter().map(|number| (*number, Vec::new())));
        }
    }
    let refusal = SeccompAction::Errno(EPERM as u32);
    programs.push(SeccompFilter::new(rules, refusal, SeccompAction::Allow, arch)?.try_into()?);
    Ok(programs)
}

/// A condition on the first argument.
fn rule(operator: SeccompCmpOp, value: u64, length: SeccompCmpArgLen) -> Result<SeccompRule, SeccompError> {
    Ok(SeccompRule::new(vec![SeccompCondition::new(0, length, operator, value)?])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_opens_its_calls_and_the_program_fits() {
        let plain = default_profile(&|_| false).unwrap();
        let admin = default_profile(&|capability| capability == Capability::SysAdmin).unwrap();
        assert_eq!((plain.len(), admin.len()), (2, 1), "an administrator may use clone3");
        assert!(admin[0].len() > plain[1].len());
        assert!(plain.iter().chain(&admin).all(|program| program.len() < 4096), "the kernel's bound");
    }
}
