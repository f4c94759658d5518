"""How many files this process may have open: loader workers, ranks and logs want more than the strictest limits."""

import resource

BASE = 64  # what the interpreter, torch, the logs and a few ranks have open
A_WORKER = 16  # its queues, and the tensors that are on their way from it


def allow_open_files(workers: int) -> None:
    """Raise this process's limit of open files to what a run with so many loader workers needs, where it is lower.

    Raises ValueError where the system's own limit is lower, too: what would fail is whatever comes last.
    """
    needed = BASE + A_WORKER * workers
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed >= needed:
        return
    if most != resource.RLIM_INFINITY and most < needed:
        raise ValueError(
            f"`workers` {workers} need up to {needed} open files, and this process may have {most}: Too many open "
            f"files; raise the limit (ulimit -n {needed})" + (", or use fewer `workers`" if workers else "")
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
