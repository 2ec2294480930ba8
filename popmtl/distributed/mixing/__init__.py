"""The mixing transports, one file each: how rows of X reach the actors that need them."""
