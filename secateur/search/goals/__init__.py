"""What a search between linears is to reach, one file a goal: it reads the recipe's words once, and then chooses."""
