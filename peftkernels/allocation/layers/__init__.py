"""The layers whose ranks are decided: how they are found, who decides their ranks, and their factors in shards."""
