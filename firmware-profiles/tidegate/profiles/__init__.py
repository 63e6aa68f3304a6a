"""Board profiles, one TOML per board. Data only: `tidegate.edge` reads them."""
