"""The loops that train roles: they only compose algorithms, backbone and rollouts."""
