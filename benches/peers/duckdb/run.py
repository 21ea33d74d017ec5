#!/usr/bin/env python3
"""DuckDB over the same files: as Parquet in the page cache, and from tables of its own in memory.

    python3 -m venv /tmp/duckdb && /tmp/duckdb/bin/pip install duckdb
    /tmp/duckdb/bin/python benches/peers/duckdb/run.py --suite tpch --scale 1 \\
        --path target/bench-data --threads 2 --iterations 15 -o duckdb.json

Inputs: the data that `benches/run.sh` generated below --path. The two modes run interleaved, after
        a first round that is not measured.
Writes: the document of `stoa-bench run` of another engine with the modes parquet and tables, for
        `stoa-bench tables`, and duckdb.<mode>.json in dfbench's format.

Only TPC-H: its queries are the texts of cli/queries. Times of another program, measured at another
time, are compared by their medians, not as paired ratios.
"""

import argparse
import glob
import json
import math
import os
import statistics
import sys
import time

import duckdb

TABLES = ["lineitem", "orders", "partsupp", "part", "customer", "supplier", "nation", "region"]
HERE = os.path.dirname(os.path.abspath(__file__))
QUERIES = os.path.join(HERE, "..", "..", "..", "cli", "queries")
MODES = ["parquet", "tables"]


def queries():
    """The texts by number."""
    found = {}
    for path in sorted(glob.glob(os.path.join(QUERIES, "q*.sql"))):
        number = int(os.path.basename(path)[1:3])
        with open(path, encoding="utf-8") as text:
            found[number] = text.read().strip().rstrip(";")
    if not found:
        sys.exit(f"no queries in {QUERIES}")
    return found


def connect(mode, data, threads):
    """A connection with the eight tables, and the bytes of memory that they take."""
    connection = duckdb.connect(":memory:")
    connection.execute(f"set threads = {threads}")
    total = 0
    kind = "view" if mode == "parquet" else "table"
    for table in TABLES:
        files = os.path.join(data, table, "*.parquet")
        if not glob.glob(files):
            sys.exit(f"no Parquet files in {os.path.dirname(files)}; generate them with benches/run.sh")
        connection.execute(f"create {kind} {table} as select * from read_parquet('{files}')")
        total += sum(os.path.getsize(path) for path in glob.glob(files))
    if kind == "table":
        rows = connection.execute("select sum(memory_usage_bytes) from duckdb_memory()").fetchone()
        total = int(rows[0])
    return connection, total


def geomean(values):
    """The geometric mean."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=["tpch"], default="tpch")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--path", default="target/bench-data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("-o", "--output", required=True)
    arguments = parser.parse_args()

    data = os.path.join(arguments.path, f"tpch-sf{arguments.scale:g}")
    texts = queries()
    sessions, memory = {}, {}
    for mode in MODES:
        sessions[mode], memory[mode] = connect(mode, data, arguments.threads)
    times = {mode: {number: [] for number in texts} for mode in MODES}
    rows = {}
    for iteration in range(arguments.iterations + 1):
        for number, text in texts.items():
            for turn in range(len(MODES)):
                mode = MODES[(turn + iteration) % len(MODES)]
                start = time.perf_counter()
                answer = sessions[mode].execute(text).fetchall()
                elapsed = (time.perf_counter() - start) * 1000
                rows[number] = len(answer)
                if iteration > 0:
                    times[mode][number].append(elapsed)
        print(f"round {iteration} of {arguments.iterations}", file=sys.stderr)

    context = {
        "duckdb_version": duckdb.__version__,
        "num_cpus": os.cpu_count(),
        "start_time": int(time.time()),
        "arguments": sys.argv[1:],
    }
    parquet_bytes = memory["parquet"]
    medians = {
        mode: {number: statistics.median(values) for number, values in of.items()}
        for mode, of in times.items()
    }
    document = {
        "context": context,
        "engine": f"DuckDB {duckdb.__version__}",
        "suite": arguments.suite,
        "scale": arguments.scale,
        "parquet_bytes": parquet_bytes,
        "modes": MODES,
        "summary": {
            mode: {
                "bytes": memory[mode],
                "bytes_vs_parquet": memory[mode] / parquet_bytes,
                "load_seconds": 0.0,
                "attach_ms": 0.0,
                "hot_origin_requests": 0,
                "geomean_ms": geomean(medians[mode].values()),
                "geomean_vs_parquet": geomean(medians[mode].values())
                / geomean(medians["parquet"].values()),
            }
            for mode in MODES
        },
        "queries": {
            str(number): {mode: {"median_ms": medians[mode][number]} for mode in MODES}
            for number in texts
        },
    }
    with open(arguments.output, "w", encoding="utf-8") as out:
        json.dump(document, out, indent=2)
    for mode in MODES:
        dfbench = {
            "context": context,
            "queries": [
                {
                    "query": f"Query {number}",
                    "iterations": [
                        {"elapsed": elapsed, "row_count": rows[number]}
                        for elapsed in times[mode][number]
                    ],
                    "start_time": context["start_time"],
                    "success": True,
                }
                for number in texts
            ],
        }
        path = f"{os.path.splitext(arguments.output)[0]}.{mode}.json"
        with open(path, "w", encoding="utf-8") as out:
            json.dump(dfbench, out, indent=2)


if __name__ == "__main__":
    main()
