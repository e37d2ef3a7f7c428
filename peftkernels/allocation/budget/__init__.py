"""What a budget is counted in, how it falls, and which ranks it keeps where they cost different amounts."""
