# In one guest: all tests of transfers over a device, with one device for both ends. The test program
# is `transfer-tests` in PATH.
# shellcheck shell=dash
rxe-up || exit 1
export STOA_RDMA_ADDRESS="10.9.0.$NODE"
limited=rdma::tests::too_little_lockable_memory_is_said_and_costs_nothing_else
sealed=rdma::verbs::tests::the_owner_of_a_sealed_file_can_open_it_and_it_stays_sealed
removing=rdma::tests::a_batch_whose_device_is_removed_ends_over_the_transport_below
status=0

echo "== transfers over one device"
transfer-tests rdma:: --ignored --test-threads 1 --nocapture --skip "$limited" --skip "$removing" \
    --skip between_hosts || status=1

echo "== without the right to lock memory"
# Root may lock what it likes.
chmod 666 /dev/infiniband/*
(
    ulimit -l 1024
    su -s /bin/sh -c "/test/transfer-tests --exact $limited --ignored --nocapture" nobody &&
        su -s /bin/sh -c "/test/transfer-tests --exact $sealed" nobody
) || status=1

echo "== the device is removed under a batch"
transfer-tests --exact "$removing" --ignored --nocapture || status=1
exit "$status"
