"""What goes wrong with launching."""


class LaunchError(RuntimeError):
    """Runs can't be started as asked; the message says the fix."""


class JobFailed(RuntimeError):
    """A run did not reach its end; the message says why and shows the end of its log."""
