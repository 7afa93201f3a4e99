"""Errors as a user wants to see them: one message, one exit code, no traceback."""

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager

import typer

from past_ray.errors import PastRayError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


@contextmanager
def user_errors(on_interrupt: str = "interrupted; the same command continues") -> Generator[None]:
    """End the process with a message and an exit code instead of a traceback.

    Args:
        on_interrupt: What Ctrl-C leaves behind, in words.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    for noisy in ("httpx", "httpx2", "ray", "vllm", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        yield
    except KeyboardInterrupt:
        typer.secho(on_interrupt, err=True, fg="yellow")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except PastRayError as error:
        # Ray hands over an actor's error as a class of both; its own text is a whole traceback.
        cause = getattr(error, "cause", None) or error
        typer.secho(f"{type(cause).__name__}: {cause}", err=True, fg="red")
        raise typer.Exit(EXIT_FAILED) from error
