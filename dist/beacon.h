/* beacon.h: a sign of life between the hosts of a job, by UDP, beside MPI and whatever state that is in.
 *
 * A star: host 0 is its centre.  Each of the others sends to it, and it answers to the address that a host's last
 * datagram came from, so that only the centre's addresses have to be told around.  Some hundred bytes a host
 * and second; one that is lost does no harm.  A number drawn for the job keeps strangers' datagrams out.
 */
#ifndef SEL_DIST_BEACON_H
#define SEL_DIST_BEACON_H

#include <stdbool.h>
#include <stdint.h>
#include "core/base/error.h"
#include "core/base/pulse.h"

typedef struct sel_beacon sel_beacon;

/* Where the centre is: as the operating system writes addresses, for the same program on other hosts. */
typedef struct {
    uint64_t job;
    uint16_t port;              /* network order */
    uint16_t n;
    unsigned char address[8][16];
    unsigned char v6[8];        /* 16 bytes of IPv6, else 4 of IPv4 */
} sel_beacon_card;

/* What is told. */
typedef struct {
    int32_t host;               /* of the sender */
    int32_t rank;               /* the one that is furthest behind: of the sender's, or, from the centre, of all */
    int32_t ending;             /* the sender is about to end the job */
    int32_t stale_ms;           /* how long that rank has not got on */
    sel_pulse_view pulse;       /* where it is */
} sel_beacon_news;

/* The centre's end: draws the job's number, fills the card for the others.  SEL_EIO. */
sel_status sel_beacon_center(sel_beacon **b, int hosts, sel_beacon_card *card);

/* The end of another host. */
sel_status sel_beacon_leaf(sel_beacon **b, const sel_beacon_card *card);

void sel_beacon_close(sel_beacon **b);

/* To the centre; from the centre to that host, if it has been heard.  Never waits; what cannot be sent is lost. */
void sel_beacon_send(sel_beacon *b, int host, const sel_beacon_news *news);

/* The next datagram of this job that has arrived; false when there is none. */
bool sel_beacon_receive(sel_beacon *b, sel_beacon_news *news);

#endif
