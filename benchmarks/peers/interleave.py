"""Give several runs the processor in turn, so that a noisy hour is noisy for all of them.

    python benchmarks/peers/interleave.py --turn 10 --log FOLDER < COMMANDS

COMMANDS holds one command a line; empty lines and those that begin with # are skipped. All are started; each is let run until
it has spent TURN CPU seconds, then it is held (SIGSTOP) and the next goes on. The scripts count their own CPU seconds,
so being held costs them nothing. What a command prints goes to FOLDER/NUMBER.log. Exit code 1 if any of them failed.
Linux only: CPU seconds are read from /proc.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system seconds that a process has spent.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    return (int(fields[11]) + int(fields[12])) / TICKS


def turn(process: "subprocess.Popen[bytes]", seconds: float, every: float = 0.05) -> bool:
    """Let a held process spend CPU seconds, and hold it again; returns False once it has ended."""
    start = cpu_seconds(process.pid)
    process.send_signal(signal.SIGCONT)
    while process.poll() is None:
        if cpu_seconds(process.pid) - start >= seconds:
            process.send_signal(signal.SIGSTOP)
            return True
        time.sleep(every)
    return False


def interleave(commands: list[list[str]], seconds: float, log: Path) -> list[int]:
    """Run commands in turns of so many CPU seconds, to their ends; returns their exit codes in the order given."""
    log.mkdir(parents=True, exist_ok=True)
    processes = []
    try:
        for number, command in enumerate(commands):
            with (log / f"{number}.log").open("wb") as file:
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            process.send_signal(signal.SIGSTOP)
            processes.append(process)
        under_way = list(processes)
        while under_way:
            under_way = [process for process in under_way if turn(process, seconds)]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [process.returncode for process in processes]


def main() -> int:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turn", type=float, default=10.0, help="CPU seconds of a turn")
    parser.add_argument("--log", type=Path, required=True, help="folder for what the commands print")
    arguments = parser.parse_args()
    lines = [line.strip() for line in sys.stdin]
    commands = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    if not commands or arguments.turn <= 0:
        parser.error("give commands, one a line, on standard input, and turns of more than 0 CPU seconds")
    codes = interleave(commands, arguments.turn, arguments.log)
    for number, (command, code) in enumerate(zip(commands, codes, strict=True)):
        print(f"{code:4d}  {shlex.join(command)}" + (f"  (see {arguments.log / f'{number}.log'})" if code else ""))
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
