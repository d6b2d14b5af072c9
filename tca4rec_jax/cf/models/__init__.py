"""One file per CF model, and the registry of all of them."""
