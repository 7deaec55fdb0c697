"""`python -m clipcast` is `clipcast`."""

from clipcast.cli import main

main()
