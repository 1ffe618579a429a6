"""Learning what each of several sources counts in the weights that are made of them."""
