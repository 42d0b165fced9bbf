"""Training of draft heads: `specfx train mtp`."""
