"""Taking windows of tokens through a model block by block: which linears read what, and when each is due."""
