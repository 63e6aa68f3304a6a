"""What a board says of its power, heat and battery, read from files under a given root."""
