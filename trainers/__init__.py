"""Training programs: `python -m trainers.cifar --help`."""
