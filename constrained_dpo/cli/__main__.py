"""`python -m constrained_dpo.cli`, as launchers of several processes start it."""

from constrained_dpo.cli.main import main

main()
