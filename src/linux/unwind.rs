//! What the standard library calls to walk the stack, for binaries that have nothing to walk it by.
//!
//! A board's binary aborts at a panic and is linked without tables for unwinding (`cross/unwind.ld`), so a backtrace is
//! empty whatever walks it. The walk of LLVM's libunwind, and what the standard library has to read symbols and lines
//! from a binary that carries neither, are left out of it by these: a fiftieth of its size.

use std::ffi::{c_int, c_void};

/// `_URC_END_OF_STACK`.
const END_OF_STACK: c_int = 5;

/// Never calls `trace`.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Backtrace(_trace: *const c_void, _argument: *mut c_void) -> c_int {
    END_OF_STACK
}

/// Continues unwinding after a cleanup. Nothing unwinds.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume(_exception: *mut c_void) -> ! {
    std::process::abort()
}

/// Questions about a frame. No frame is ever handed out to ask about.
macro_rules! no_frame {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name(_frame: *mut c_void) -> usize {
                0
            }
        )*
    };
}

no_frame! {
    _Unwind_FindEnclosingFunction
    _Unwind_GetCFA
    _Unwind_GetDataRelBase
    _Unwind_GetIP
    _Unwind_GetLanguageSpecificData
    _Unwind_GetRegionStart
    _Unwind_GetTextRelBase
}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_GetIPInfo(_frame: *mut c_void, _before: *mut c_int) -> usize {
    0
}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_SetGR(_frame: *mut c_void, _register: c_int, _value: usize) {}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_SetIP(_frame: *mut c_void, _address: usize) {}
