"""The number of cores that this process may use."""


def cores() -> int:
    """Returns how many cores this process may use, by its affinity and a container's quota."""
    import joblib  # reads the quota; workers that encode texts never count cores and start sooner

    return int(joblib.cpu_count())
