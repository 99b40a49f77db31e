"""Training loops of the roles. They compose algorithms, backbone and rollouts, and hold no math."""
