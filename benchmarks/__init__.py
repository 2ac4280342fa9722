"""Speed, memory and size of the method's parts, each as a ratio against a stated baseline in the same run."""
