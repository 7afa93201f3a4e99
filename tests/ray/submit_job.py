"""Start a local cluster, run ``ray job submit`` against it, end it. Arguments: run_dir, cache."""

import subprocess
import sys
import tempfile
from pathlib import Path

import ray


def main() -> int:
    run_dir, cache = sys.argv[1:]
    # Ray may still be writing its logs while it ends.
    with tempfile.TemporaryDirectory(
        prefix="pr_", dir="/tmp", ignore_cleanup_errors=True
    ) as temp_dir:
        context = ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=True,
            dashboard_port=0,
            log_to_driver=False,
            _temp_dir=temp_dir,
        )
        try:
            return subprocess.run(
                [
                    *(
                        str(Path(sys.executable).with_name("ray")),
                        "job",
                        "submit",
                        "--address",
                        f"http://{context.dashboard_url}",
                    ),
                    *("--working-dir", "."),
                    *("--runtime-env-json", f'{{"env_vars": {{"PAST_RAY_CACHE": "{cache}"}}}}'),
                    *("--", sys.executable, "-m", "jobs.run_past"),
                    *("--config", "jobs/configs/smoke.yaml", f"run_dir={run_dir}"),
                ],
                check=False,
            ).returncode
        finally:
            ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
