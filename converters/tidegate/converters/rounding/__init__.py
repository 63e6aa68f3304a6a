"""From floats to packed integers: grids, searches, error feedback, and bits for each weight."""
