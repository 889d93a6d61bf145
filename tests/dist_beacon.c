/* dist_beacon.c: signs of life between hosts, here all on one. */
#include <arpa/inet.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "dist/beacon.h"
#include "tests/check.h"

/* A datagram to this host takes no time, but some. */
static bool receive(sel_beacon *b, sel_beacon_news *news)
{
    for (int i = 0; i < 100; i++) {
        if (sel_beacon_receive(b, news)) return true;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    return false;
}

static bool receive_last(sel_beacon *b, sel_beacon_news *news)
{
    if (!receive(b, news)) return false;
    while (sel_beacon_receive(b, news)) continue; /* one came to each of the centre's addresses */
    return true;
}

int main(void)
{
    sel_beacon *center, *one, *two, *stranger;
    sel_beacon_card card, other_job;
    sel_beacon_news news = {.host = 1, .rank = 4, .stale_ms = 1500}, got;

    CHECK_OK(sel_beacon_center(&center, 3, &card));
    CHECK_OK(sel_beacon_leaf(&one, &card));
    CHECK_OK(sel_beacon_leaf(&two, &card));
    CHECK(!sel_beacon_receive(center, &got), "nothing was sent");

    /* Before a host has been heard there is no address to answer to. */
    sel_beacon_send(center, 1, &news);
    CHECK(!sel_beacon_receive(one, &got), "an answer to nobody");

    news.pulse.step = 30;
    news.pulse.position = 265;
    strcpy(news.pulse.phase, "forward");
    sel_beacon_send(one, 0, &news);
    CHECK(receive_last(center, &got), "host 1 is not heard");
    CHECK(got.host == 1 && got.rank == 4 && got.stale_ms == 1500 && got.pulse.step == 30 && got.pulse.position == 265 &&
          strcmp(got.pulse.phase, "forward") == 0, "host %d, rank %d, %s", got.host, got.rank, got.pulse.phase);

    news.host = 2;
    sel_beacon_send(two, 0, &news);
    CHECK(receive_last(center, &got) && got.host == 2, "host 2 is not heard");
    news.host = 0;
    news.ending = 1;
    sel_beacon_send(center, 2, &news);
    CHECK(receive(two, &got) && got.ending == 1 && !sel_beacon_receive(one, &got), "the answer is host 2's");

    /* Another job's datagrams, a host that there is not, and noise are passed over. */
    other_job = card;
    other_job.job++;
    CHECK_OK(sel_beacon_leaf(&stranger, &other_job));
    news.host = 1;
    sel_beacon_send(stranger, 0, &news);
    news.host = 3;
    sel_beacon_send(one, 0, &news);
    const int fd = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = card.port, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    CHECK(sendto(fd, "x", 1, 0, (const struct sockaddr *)&to, sizeof to) == 1, "noise");
    close(fd);
    CHECK(!receive(center, &got), "host %d of another job", got.host);

    sel_beacon_close(&stranger);
    sel_beacon_close(&two);
    sel_beacon_close(&one);
    sel_beacon_close(&center);
    sel_beacon_close(&center);
    return check_verdict();
}
