"""Does a reward model hold when it is optimised? Best-of-n curves against a gold reward."""
