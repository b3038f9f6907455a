"""A worker that fails or hangs in the third step; run by test_failures.py under horovodrun."""

import os
import signal
import sys
import time

import nlcg_tf.horovod as hvd

how, who = sys.argv[1], int(sys.argv[2])
hvd.init()
with hvd.Watch(seconds=3) as watch:
    for step in range(5):
        if step == 2 and hvd.rank() == who:
            if how == "raises":
                raise ValueError("this worker's own error")
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "is busy":
                time.sleep(8)
            if how == "is frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
        watch.tick()
        hvd.sum_over_workers([step])
