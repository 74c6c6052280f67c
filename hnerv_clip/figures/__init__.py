"""Every figure of the book: one style, `plot_x(table) -> Figure`. Nothing is computed here."""
