"""What comes from outside: the package index as pip is configured, and archives."""
