/* beacon.c: datagrams between hosts.  No MPI in here, and nothing that waits. */
#include "dist/beacon.h"

#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

/* One dual-stack socket: IPv4 addresses are written as IPv6 ones (RFC 4291, section 2.5.5.2); a kernel without IPv6
   gets an IPv4 socket. */
struct sel_beacon {
    int fd, family;
    uint64_t job;
    int n;                              /* of to: addresses of the centre, or, there, hosts */
    struct sockaddr_storage *to;        /* family 0: not heard yet */
    bool center;
};

typedef struct {
    uint64_t magic, job;
    sel_beacon_news news;
} datagram;

#define MAGIC 0x31676f6463746177u

static sel_status fail_errno(const char *doing)
{
    return sel_fail(SEL_EIO, "watchdog: %s for the signs of life between hosts: %s", doing, strerror(errno));
}

static socklen_t address_bytes(int family)
{
    return family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);
}

static void fill(struct sockaddr_storage *out, int family, const unsigned char *address, bool v6, uint16_t port)
{
    memset(out, 0, sizeof *out);
    if (family == AF_INET6) {
        struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_port = port};
        if (v6) {
            memcpy(&a.sin6_addr, address, 16);
        } else {
            a.sin6_addr.s6_addr[10] = a.sin6_addr.s6_addr[11] = 0xff;
            memcpy(a.sin6_addr.s6_addr + 12, address, 4);
        }
        memcpy(out, &a, sizeof a);
    } else if (!v6) {
        struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = port};
        memcpy(&a.sin_addr, address, 4);
        memcpy(out, &a, sizeof a);
    }
}

static sel_status open_socket(sel_beacon **out, uint16_t *port)
{
    static const unsigned char any[16];
    sel_beacon *b = calloc(1, sizeof *b);
    struct sockaddr_storage mine;
    socklen_t bytes = sizeof mine;
    const int off = 0;

    if (!b) return sel_fail(SEL_ENOMEM, "out of memory");
    b->family = AF_INET6;
    b->fd = socket(AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (b->fd < 0) {
        b->family = AF_INET;
        b->fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    } else {
        setsockopt(b->fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    }
    *out = b;
    if (b->fd < 0) return fail_errno("no socket");
    fill(&mine, b->family, any, b->family == AF_INET6, 0);
    if (bind(b->fd, (const struct sockaddr *)&mine, address_bytes(b->family)) != 0) return fail_errno("no port");
    if (getsockname(b->fd, (struct sockaddr *)&mine, &bytes) != 0) return fail_errno("no port");
    if (b->family == AF_INET6) {
        struct sockaddr_in6 a;
        memcpy(&a, &mine, sizeof a);
        *port = a.sin6_port;
    } else {
        struct sockaddr_in a;
        memcpy(&a, &mine, sizeof a);
        *port = a.sin_port;
    }
    return SEL_OK;
}

/* This host's addresses that others may reach; those of the loopback only where there is nothing else. */
static void list_addresses(const struct ifaddrs *all, bool loopback, sel_beacon_card *card)
{
    for (const struct ifaddrs *i = all; i && card->n < 8; i = i->ifa_next) {
        if (!i->ifa_addr || !(i->ifa_flags & IFF_UP) || !(i->ifa_flags & IFF_LOOPBACK) == loopback) continue;
        if (i->ifa_addr->sa_family == AF_INET) {
            struct sockaddr_in a;
            memcpy(&a, i->ifa_addr, sizeof a);
            memcpy(card->address[card->n++], &a.sin_addr, 4);
        } else if (i->ifa_addr->sa_family == AF_INET6) {
            struct sockaddr_in6 a;
            memcpy(&a, i->ifa_addr, sizeof a);
            if (IN6_IS_ADDR_LINKLOCAL(&a.sin6_addr)) continue;   /* means something to its own link only */
            card->v6[card->n] = 1;
            memcpy(card->address[card->n++], &a.sin6_addr, 16);
        }
    }
}

sel_status sel_beacon_center(sel_beacon **b, int hosts, sel_beacon_card *card)
{
    struct ifaddrs *all = NULL;

    *b = NULL;
    memset(card, 0, sizeof *card);
    sel_status rc = open_socket(b, &card->port);
    if (rc == SEL_OK && getrandom(&card->job, sizeof card->job, 0) != sizeof card->job) rc = fail_errno("no number");
    if (rc == SEL_OK && getifaddrs(&all) != 0) rc = fail_errno("no addresses");
    if (rc == SEL_OK) {
        list_addresses(all, false, card);
        if (card->n == 0) list_addresses(all, true, card);
        (*b)->job = card->job;
        (*b)->n = hosts;
        (*b)->center = true;
        (*b)->to = calloc((size_t)hosts, sizeof *(*b)->to);
        if (!(*b)->to) rc = sel_fail(SEL_ENOMEM, "out of memory");
    }
    if (all) freeifaddrs(all);
    if (rc != SEL_OK) sel_beacon_close(b);
    return rc;
}

sel_status sel_beacon_leaf(sel_beacon **b, const sel_beacon_card *card)
{
    uint16_t port;

    *b = NULL;
    sel_status rc = open_socket(b, &port);
    if (rc == SEL_OK && !((*b)->to = calloc(card->n ? card->n : 1, sizeof *(*b)->to)))
        rc = sel_fail(SEL_ENOMEM, "out of memory");
    if (rc != SEL_OK) {
        sel_beacon_close(b);
        return rc;
    }
    (*b)->job = card->job;
    (*b)->n = card->n;
    for (int i = 0; i < card->n; i++)
        fill(&(*b)->to[i], (*b)->family, card->address[i], card->v6[i], card->port);
    return SEL_OK;
}

void sel_beacon_close(sel_beacon **b)
{
    if (!*b) return;
    if ((*b)->fd >= 0) close((*b)->fd);
    free((*b)->to);
    free(*b);
    *b = NULL;
}

void sel_beacon_send(sel_beacon *b, int host, const sel_beacon_news *news)
{
    datagram d;

    memset(&d, 0, sizeof d);
    d.magic = MAGIC;
    d.job = b->job;
    d.news = *news;
    for (int i = b->center ? host : 0; i < (b->center ? host + 1 : b->n); i++)
        if (b->to[i].ss_family)
            (void)!sendto(b->fd, &d, sizeof d, 0, (const struct sockaddr *)&b->to[i], address_bytes(b->family));
}

bool sel_beacon_receive(sel_beacon *b, sel_beacon_news *news)
{
    datagram d;
    struct sockaddr_storage from;

    for (;;) {
        socklen_t bytes = sizeof from;
        const ssize_t n = recvfrom(b->fd, &d, sizeof d, 0, (struct sockaddr *)&from, &bytes);
        /* An error that an earlier datagram met (refused, unreachable) is told here, once each. */
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
        if (n < 0 && errno != EINTR && errno != ECONNREFUSED && errno != EHOSTUNREACH && errno != ENETUNREACH)
            return false;
        if (n != sizeof d || d.magic != MAGIC || d.job != b->job) continue;
        if (b->center && (d.news.host < 1 || d.news.host >= b->n)) continue;
        if (b->center) b->to[d.news.host] = from;
        d.news.pulse.phase[SEL_PULSE_NAME - 1] = d.news.pulse.collective[SEL_PULSE_NAME - 1] = '\0';
        d.news.pulse.exchange[SEL_PULSE_NAME - 1] = '\0';
        *news = d.news;
        return true;
    }
}
