//! Remotely readable memory: batches of reads between hosts over TCP or RDMA.
