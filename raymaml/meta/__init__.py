"""Model-agnostic meta-learning (Finn et al. 2017), and nothing else."""
