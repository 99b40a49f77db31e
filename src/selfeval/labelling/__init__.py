"""Labels of people: their file, the order in which pairs are shown, and the figures that are estimated from them."""
