"""A folder of SAEs <-> a repository on the Hub, with its card."""
