"""MLflow project backends: the same training on a cluster, and its end in the run.

``mlflow run . --backend ray`` and ``--backend slurm`` load these by their entry points. What a cluster needs is
imported when it is used.
"""
