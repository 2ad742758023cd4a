"""A seccomp filter of system calls, compiled by libseccomp.

It refuses what the tests of a short program never need: reading other processes, further
namespaces and mounts, keys, kernel modules, and sockets to anything but itself. Namespaces and a
user without rights stop most of it already; sockets of a virtual machine's host are stopped here
alone.
"""

import ctypes
import ctypes.util
import errno
import functools
import os
import socket

_REFUSED = """
    acct add_key bpf clock_adjtime clock_settime delete_module fanotify_init finit_module
    init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load
    kexec_load keyctl lookup_dcookie mount mount_setattr move_mount move_pages name_to_handle_at
    nfsservctl open_by_handle_at open_tree fsopen fsmount fspick perf_event_open personality
    pidfd_getfd pivot_root process_madvise process_vm_readv process_vm_writev ptrace quotactl
    reboot request_key setns settimeofday swapoff swapon syslog umount2 unshare userfaultfd vhangup
"""
_ALLOW = 0x7FFF0000
_NOT_EQUAL, _MASKED_EQUAL = 1, 7
_NEW_USER_NAMESPACE = 0x10000000


class _Argument(ctypes.Structure):
    """libseccomp's `scmp_arg_cmp`."""

    _fields_ = (
        ("number", ctypes.c_uint),
        ("comparison", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def problem() -> str | None:
    """Why there is no filter; None if there is one."""
    try:
        _filter()
    except OSError as error:
        return str(error)
    return None


def filter_file() -> int | None:
    """A descriptor of a new file with the filter, at its beginning; None where there is none."""
    if problem():
        return None
    file = os.memfd_create("filter")
    os.write(file, _filter())
    os.lseek(file, 0, os.SEEK_SET)
    return file


@functools.cache
def _filter() -> bytes:
    """The program of the filter. Raises `OSError` without libseccomp."""
    name = ctypes.util.find_library("seccomp") or "libseccomp.so.2"
    library = ctypes.CDLL(name)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Argument)
    ]  # fmt: skip
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    rules = library.seccomp_init(_ALLOW)

    def refuse(call: str, code: int = errno.EPERM, argument: _Argument | None = None) -> None:
        number = library.seccomp_syscall_resolve_name(call.encode())
        if number < 0:  # unknown on this processor or to this library
            return
        wanted = (_Argument * 1)(argument) if argument else None
        failed = library.seccomp_rule_add_array(
            rules, 0x00050000 | code, number, 1 if argument else 0, wanted
        )
        if failed:
            raise OSError(-failed, f"libseccomp takes no rule for {call}")

    try:
        for call in _REFUSED.split():
            refuse(call)
        refuse("socket", argument=_Argument(0, _NOT_EQUAL, socket.AF_UNIX, 0))
        new_user = _Argument(0, _MASKED_EQUAL, _NEW_USER_NAMESPACE, _NEW_USER_NAMESPACE)
        refuse("clone", argument=new_user)
        # Its flags are in memory, which a filter cannot read; C libraries then use clone.
        refuse("clone3", errno.ENOSYS)
        with open(os.memfd_create("rules"), "rb") as file:
            failed = library.seccomp_export_bpf(rules, file.fileno())
            if failed:
                raise OSError(-failed, "libseccomp cannot write the filter")
            file.seek(0)
            return file.read()
    finally:
        library.seccomp_release(rules)
