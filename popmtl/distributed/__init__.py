"""The population on a Ray cluster: Ray is the control plane, the mixing transports are the data plane."""
