"""Functions of `os` that macOS does not have."""

LINUX_ONLY = (
    "copy_file_range", "eventfd", "fdatasync", "getrandom", "getresuid", "getxattr", "memfd_create", "pidfd_open",
    "pipe2", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity", "setxattr", "splice",
    "unshare",
)  # fmt: skip
