# In each of two guests with two wires between them: guest 1 serves its memory, guest 2 reads it. The
# test program is `transfer-tests` in PATH.
# shellcheck shell=dash
rxe-up 0 && rxe-up 1 || exit 1
if [ "$NODE" = 1 ]; then
    # It is killed in the last test.
    transfer-tests --exact rdma::tests::between_hosts_serving --ignored
    # Until the other guest has seen it.
    sleep 3
    exit 0
fi
status=0
transfer-tests rdma::tests::between_hosts_ --ignored --nocapture --test-threads 1 \
    --skip between_hosts_serving || status=1
exit "$status"
