"""Meta-reinforcement learning: environments, rollouts, policies and meta-updates."""
