"""The Lambda door with the bench's views, for `python -m awslambdaric tests.benchmarks.serving_function.handler`."""

from tests.benchmarks import serving_world

serving_world.install()

from inference.handlers.aws_lambda import handler  # noqa: E402 - after the views

__all__ = ["handler"]
