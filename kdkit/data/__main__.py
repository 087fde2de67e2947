"""`python -m kdkit.data`: see `kdkit.data.show`."""

from kdkit.data import main

main()
