"""`python -m chatproxy doctor URL`: examines a deployed service from where its users are."""
