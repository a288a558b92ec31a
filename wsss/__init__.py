"""Weakly supervised semantic segmentation from image-level labels."""

__version__ = "0.1.0"


class InputError(ValueError):
    """What the user gave cannot be used: a file, a config value, a label, a checkpoint.

    The message is one sentence that names the file or key, what was expected, what was found and what to do.
    The commands print it without a traceback and exit with code 2. It lives here, in the one module that
    imports nothing, so that every layer can raise it.
    """


class RunError(RuntimeError):
    """A run failed for a reason its user can act on, a diverged loss for instance.

    The commands print the message without a traceback and exit with code 1.
    """
