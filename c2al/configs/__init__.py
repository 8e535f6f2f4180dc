"""The configurations that ship with c2al, as TOML files."""
