"""How the product is run: database, deployment, commands."""

from infra.terminal import end_with_one_line

end_with_one_line()
