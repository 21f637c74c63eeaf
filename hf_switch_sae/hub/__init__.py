"""Files of a local folder or a Hub repository, by name; knows no SAE."""
