"""Find by text or by region: rankings, heat maps, and an index over many videos."""
